"""The compiled parts land here when they are built (csrc/README.md); none is needed to import the library."""
