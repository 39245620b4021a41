"""The loading of weights, from a WEIGHTS argument to a pipeline on the device."""
