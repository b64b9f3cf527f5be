# Server-sent events: start, stdout, stderr, file, end.
curl -N -X POST "${ZEROBOOT_BASE_URL:-http://127.0.0.1:8080}/v1/exec" \
  -H 'Accept: text/event-stream' \
  -H 'Content-Type: application/json' \
  -H "Authorization: Bearer ${ZEROBOOT_API_KEY:-}" \
  -d '{"code": "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.2)"}'
