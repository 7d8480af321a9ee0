"""A run and what it leaves behind: the main job, its folder, its network as a file, its measurements."""
