"""Tests of the web pages in real browsers."""
