"""What every study uses: its command line, how it runs and ends, training, testing, pictures."""
