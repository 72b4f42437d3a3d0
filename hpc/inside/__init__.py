"""Inside the image: the standard library at module level, the image's libraries inside functions."""
