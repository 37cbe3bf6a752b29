"""The dry run: what a search would take of data, bytes, memory and time, without Flower and Ray."""
