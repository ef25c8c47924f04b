"""What clients asked to keep (responses, chat completions), in one SQLite file that all HTTP workers share."""
