"""From shot scripts to frames."""
