"""What several tests share: oracles, runs of many steps, devices and processes."""
