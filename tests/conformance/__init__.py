"""One table of all algorithms, and one battery that each row passes."""
