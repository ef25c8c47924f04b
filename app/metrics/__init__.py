"""What the service counts and measures, in the form that Prometheus reads."""
