"""Configuration of the service: one `Settings` object, the checks made before anything is loaded, the log format."""

__version__ = "0.1.0"
