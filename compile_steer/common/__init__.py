"""What every layer uses: errors, progress, processes, options."""
