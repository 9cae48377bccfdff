"""Run any pipeline and read what it makes: what learning and measuring share."""
