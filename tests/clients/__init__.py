"""Real SDKs and other programs that people use."""
