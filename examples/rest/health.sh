# 200 if something can run, 503 if not.
curl "${ZEROBOOT_BASE_URL:-http://127.0.0.1:8080}/v1/health"
