"""Files: how they are written, hashed, named, and what they record of where they come from."""
