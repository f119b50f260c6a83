"""A run of a recipe: the stages in order, each kept if nothing that it depends on has changed."""
