"""Settings shared by all tests in a browser."""

from playwright.sync_api import expect

# Browsers encode a canvas (`toBlob`) when they are idle, which on a busy machine may take more than five seconds.
expect.set_options(timeout=30_000)
