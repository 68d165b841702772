"""A whole run in one process, without sockets: the protocol as a plain loop."""
