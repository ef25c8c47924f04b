"""The API described by itself: /openapi.json, /docs and the tables of docs/api.md, all made from the same models."""
