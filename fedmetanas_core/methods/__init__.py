"""A method is a named combination of parts; one registry holds them."""
