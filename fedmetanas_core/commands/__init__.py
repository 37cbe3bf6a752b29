"""A module for every command of `fedmetanas`, of the command's name; its ``run`` takes the words after that name."""
