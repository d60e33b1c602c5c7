"""Looks at a whole set-up, from the settings to the disk, and says what to do. `judge` is pure, `probes` asks; it changes nothing."""
