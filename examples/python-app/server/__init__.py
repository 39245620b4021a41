"""The web server of the sticker shop. The package's name is also one of flux-server's, which must not matter."""
