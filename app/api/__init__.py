"""HTTP: routes, checks of requests, answers and event streams in OpenAI's shapes."""
