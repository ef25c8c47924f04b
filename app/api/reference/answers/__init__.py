"""The shapes of all answers. They only describe: nothing is validated with them but by tests."""
