"""The console command: parsing and printing, no logic."""
