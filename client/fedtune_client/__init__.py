"""The client program: joins a coordinator, trains when asked, hands in what it learned, and loses none of it."""
