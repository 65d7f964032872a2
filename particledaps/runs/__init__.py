"""Everything around a run: settings, images, random streams, timing, records, pictures."""
