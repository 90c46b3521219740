// Checks that npm's openai and the AI SDK work with a node: chats, streams, errors, and requests that are given up. CONFRERE_API is HOST:PORT.
import assert from "node:assert/strict"
import { test } from "node:test"
import { setTimeout as sleep } from "node:timers/promises"

import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { APICallError, generateText, streamText } from "ai"
import OpenAI from "openai"

const url = `http://${process.env.CONFRERE_API}`
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 })
const sdk = createOpenAICompatible({ name: "confrere", baseURL: `${url}/v1`, includeUsage: true })
const story = { model: "tiny", messages: [{ role: "user", content: "Tell me a story." }], temperature: 0 }
const endless = { model: "long", prompt: "Once upon a time", temperature: 0, max_tokens: 8000 }

const generation = async () => (await (await fetch(`${url}/api/node`)).json()).generation

async function isFreed() {
    const end = Date.now() + 5000
    while ((await generation()).active > 0) {
        assert.ok(Date.now() < end, "the place of a client that went away is not freed")
        await sleep(10)
    }
}

test("openai: a chat, whole and streamed", async () => {
    const whole = await client.chat.completions.create(story)
    assert.equal(whole.choices[0].finish_reason, "stop")
    assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens)
    let text = ""
    let usage = null
    const reasons = []
    for await (const chunk of await client.chat.completions.create({ ...story, stream: true, stream_options: { include_usage: true } })) {
        text += chunk.choices[0]?.delta.content ?? ""
        if (chunk.choices[0]?.finish_reason) reasons.push(chunk.choices[0].finish_reason)
        usage = chunk.usage ?? usage
    }
    assert.equal(text, whole.choices[0].message.content)
    assert.deepEqual(reasons, ["stop"])
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens)
    assert.ok(usage.x_experts.needed > 0)
})

test("openai: its own accumulator of streams", async () => {
    const whole = await client.chat.completions.create(story)
    const final = await client.chat.completions.stream(story).finalChatCompletion()
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content)
})

test("openai: a completion with a seed", async () => {
    const ask = async (seed) => (await client.completions.create({ model: "tiny", prompt: "Once upon a time", temperature: 1, seed })).choices[0].text
    assert.equal(await ask(1), await ask(1))
    assert.notEqual(await ask(1), await ask(2))
})

test("openai: models", async () => {
    const names = []
    for await (const model of client.models.list()) names.push(model.id)
    assert.equal(names.length, 2)
    assert.equal((await client.models.retrieve("tiny")).object, "model")
})

test("openai: errors by their class", async () => {
    await assert.rejects(client.chat.completions.create({ ...story, model: "gpt-9" }), (error) => {
        assert.ok(error instanceof OpenAI.NotFoundError, `${error}`)
        assert.equal(error.code, "model_not_found")
        return true
    })
    await assert.rejects(client.chat.completions.create({ ...story, n: 2 }), (error) => {
        assert.ok(error instanceof OpenAI.BadRequestError, `${error}`)
        assert.equal(error.param, "n")
        return true
    })
    const tooLong = [{ role: "user", content: "word ".repeat(600) }]
    await assert.rejects(client.chat.completions.create({ ...story, messages: tooLong, stream: true }), { code: "context_length_exceeded" })
})

test("openai: a stream that is given up frees its place", async () => {
    const stream = await client.completions.create({ ...endless, stream: true })
    for await (const _ of stream) {
        assert.equal((await generation()).active, 1)
        break
    }
    await isFreed()
})

test("openai: a request that is aborted frees its place", async () => {
    const controller = new AbortController()
    const asked = client.completions.create(endless, { signal: controller.signal })
    const refused = assert.rejects(asked, OpenAI.APIUserAbortError)
    while ((await generation()).active === 0) await sleep(10)
    controller.abort()
    await refused
    await isFreed()
})

test("AI SDK: a text, whole and streamed", async () => {
    const ask = { model: sdk("tiny"), prompt: "Tell me a story.", temperature: 0, maxRetries: 0 }
    const whole = await generateText(ask)
    assert.equal(whole.finishReason, "stop")
    assert.ok(whole.text.length > 0 && whole.usage.outputTokens > 0)
    const streamed = streamText(ask)
    let text = ""
    for await (const part of streamed.textStream) text += part
    assert.equal(text, whole.text)
    assert.equal(await streamed.finishReason, "stop")
    assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens)
})

test("AI SDK: a completion", async () => {
    const { text, finishReason } = await generateText({ model: sdk.completionModel("tiny"), prompt: "Once upon a time", maxOutputTokens: 9, maxRetries: 0 })
    assert.ok(text.length > 0)
    assert.equal(finishReason, "length")
})

test("AI SDK: an error carries the node's words", async () => {
    await assert.rejects(generateText({ model: sdk("gpt-9"), prompt: "Hello.", maxRetries: 0 }), (error) => {
        assert.ok(APICallError.isInstance(error), `${error}`)
        assert.equal(error.statusCode, 404)
        assert.match(error.message, /gpt-9/)
        return true
    })
})
