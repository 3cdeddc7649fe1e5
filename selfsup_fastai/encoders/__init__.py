"""The network that is kept, and the file it is kept in."""
