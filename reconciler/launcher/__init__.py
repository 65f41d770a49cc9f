"""What is run, by path, for a keeper of ours."""
