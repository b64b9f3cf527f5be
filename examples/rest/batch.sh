# Several at once; the results keep the order.
curl -X POST "${ZEROBOOT_BASE_URL:-http://127.0.0.1:8080}/v1/exec/batch" \
  -H 'Content-Type: application/json' \
  -H "Authorization: Bearer ${ZEROBOOT_API_KEY:-}" \
  -d '{"executions": [{"code": "print(1)"}, {"code": "print(2)"}, {"code": "1/0"}]}'
