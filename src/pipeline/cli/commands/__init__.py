"""Every command and its flags. Bodies live in the modules of pipeline.cli and are imported when they run."""
