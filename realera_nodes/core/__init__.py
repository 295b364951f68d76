"""The mathematics of concept erasure. torch and numpy only: no host, no file format, no user interface."""
