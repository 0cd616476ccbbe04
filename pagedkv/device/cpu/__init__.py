"""The native kernel behind the CPU operator. Importing the package compiles and loads nothing."""
