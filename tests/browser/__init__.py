"""Tests in a real browser. A package, so that its server and its browser stop with its last test."""
