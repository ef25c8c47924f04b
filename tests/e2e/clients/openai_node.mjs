// The `openai` package of npm on Node: chat, streams, zod schemas, tools, responses, embeddings, errors.
//
//     npm install openai zod
//     OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none node openai_node.mjs

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "llama-3-chinese";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const client = new OpenAI({ maxRetries: 0 }); // reads OPENAI_BASE_URL and OPENAI_API_KEY

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert(names.includes(model));
console.log("models:", names.join(" "));

const answer = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 24 });
console.log("chat:", answer.choices[0].message.content);

const stream = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 24, stream: true });
const pieces = [];
for await (const chunk of stream) if (chunk.choices[0].delta.content) pieces.push(chunk.choices[0].delta.content);
console.log("stream:", pieces.join(""));
assert(pieces.length > 1, "the answer did not come in pieces");

const City = z.object({
  name: z.string().max(40), // bounds keep a small model from going on without end
  climate: z.enum(["cold", "mild", "hot"]),
  inhabitants: z.number().int().min(0).max(50_000_000),
});
const parsed = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "Describe Paris." }],
  response_format: zodResponseFormat(City, "city"),
  temperature: 0,
  max_tokens: 600,
});
console.log("parsed:", JSON.stringify(City.parse(parsed.choices[0].message.parsed)));

const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      strict: true,
      parameters: {
        type: "object",
        properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  },
];
const asked = [{ role: "user", content: "How is the weather in Rome?" }];
const options = { model, tools, temperature: 0, max_tokens: 600 };
const called = await client.chat.completions.create({ ...options, messages: asked, tool_choice: "required", parallel_tool_calls: false });
asked.push(called.choices[0].message);
for (const call of called.choices[0].message.tool_calls) {
  const { city } = JSON.parse(call.function.arguments);
  console.log("call:", call.function.name, city);
  asked.push({ role: "tool", tool_call_id: call.id, content: `It rains in ${city}.` });
}
const told = await client.chat.completions.create({ ...options, messages: asked, tool_choice: "none", max_tokens: 24 });
console.log("answer:", JSON.stringify(told.choices[0].message.content));

// The helper of the package puts the pieces of the arguments together.
const runner = client.chat.completions.stream({ ...options, messages: asked.slice(0, 1), tool_choice: "required", parallel_tool_calls: false });
const assembled = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
console.log("streamed call:", assembled.function.name, JSON.parse(assembled.function.arguments).city);

const first = await client.responses.create({ model, input: messages[0].content, temperature: 0, max_output_tokens: 24 });
console.log("response:", first.output_text);
const second = await client.responses.create({
  model,
  input: "And of Italy?",
  previous_response_id: first.id,
  temperature: 0,
  max_output_tokens: 24,
});
assert.equal(second.previous_response_id, first.id);
let text = "";
for await (const event of await client.responses.create({
  model,
  input: messages[0].content,
  temperature: 0,
  max_output_tokens: 24,
  stream: true,
})) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
console.log("response stream:", text);

const vectors = await client.embeddings.create({ model, input: ["今天天气真不错", "hello"] });
console.log("embeddings:", vectors.data.map((item) => item.embedding.length).join(" "));

await assert.rejects(
  client.chat.completions.create({ model: "no-such-model", messages }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
await assert.rejects(
  client.chat.completions.create({ model, messages, temperature: 3 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
console.log("errors: NotFoundError BadRequestError");
