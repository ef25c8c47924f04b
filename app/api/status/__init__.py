"""/status: a page on which people see how the service is."""
