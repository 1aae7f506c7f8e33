"""What leaves the house: folders for the Hub, records and model cards, exported files."""
