"""A Flower app that runs fedtune."""
