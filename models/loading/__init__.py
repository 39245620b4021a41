"""From a WEIGHTS argument to a pipeline on the device."""
