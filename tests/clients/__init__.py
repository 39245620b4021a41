"""Tests with real SDKs and other client programs."""
