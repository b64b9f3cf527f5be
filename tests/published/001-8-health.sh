curl https://api.zeroboot.dev/v1/health
