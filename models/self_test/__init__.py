"""A self test of the device: each part that the engine needs either passed, failed, or was skipped with a reason."""
