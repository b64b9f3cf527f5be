// The API by fetch alone. `output` is the same as `stdout`.
const base = process.env.ZEROBOOT_BASE_URL ?? "http://127.0.0.1:8080";

async function execCode(code: string): Promise<string> {
  const response = await fetch(`${base}/v1/exec`, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      Authorization: `Bearer ${process.env.ZEROBOOT_API_KEY ?? ""}`,
    },
    body: JSON.stringify({ code, language: "python", timeout_seconds: 10 }),
  });
  const data = (await response.json()) as { output: string; error?: string; code?: string };
  if (!response.ok) throw new Error(`${data.code ?? response.status}: ${data.error ?? ""}`);
  return data.output;
}

console.log(await execCode("print(6 * 7)"));
