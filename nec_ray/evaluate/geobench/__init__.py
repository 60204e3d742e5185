"""GEO-Bench: the papers' downstream evaluation (MMEarth, sections 5 and 6), of encoders and of archives."""
