"""Is a checkpoint complete, and do its files agree? ``smolstack verify`` shows what is found."""
