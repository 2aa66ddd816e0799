-- Recognises callers by the hash of their key. A caller whose key allows the call gets its key's name in place of the key; every
-- other call stays as it is, and the mesh decides. Above this text stand HEADER, which names the model, and KEYS: by SHA-256, the
-- name of a key and the patterns of the models that it may use. With an empty HEADER the callers are other pods, whose secret has
-- the hashes in KEYS.

local bit = require("bit")
local band, bnot, bxor, rshift, ror, tobit, tohex = bit.band, bit.bnot, bit.bxor, bit.rshift, bit.ror, bit.tobit, bit.tohex

local LONGEST = 512

-- The first 32 bits of the fractional part of the power of each of the first primes.
local function fractions(count, power)
  local found, candidate = {}, 2
  while #found < count do
    local is_prime = true
    for divisor = 2, math.floor(math.sqrt(candidate)) do
      if candidate % divisor == 0 then
        is_prime = false
        break
      end
    end
    if is_prime then
      local root = candidate ^ power
      found[#found + 1] = tobit(math.floor((root - math.floor(root)) * 2 ^ 32))
    end
    candidate = candidate + 1
  end
  return found
end

local ROUNDS, START = fractions(64, 1 / 3), fractions(8, 1 / 2)

local function word(text, at)
  local a, b, c, d = text:byte(at, at + 3)
  return tobit(a * 2 ^ 24 + b * 2 ^ 16 + c * 2 ^ 8 + d)
end

local function absorb(state, text, at)
  local w = {}
  for i = 1, 16 do
    w[i] = word(text, at + (i - 1) * 4)
  end
  for i = 17, 64 do
    local x, y = w[i - 15], w[i - 2]
    local s0 = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
    local s1 = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
    w[i] = tobit(w[i - 16] + s0 + w[i - 7] + s1)
  end
  local a, b, c, d, e, f, g, h = unpack(state)
  for i = 1, 64 do
    local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
    local choice = bxor(band(e, f), band(bnot(e), g))
    local t1 = tobit(h + s1 + choice + ROUNDS[i] + w[i])
    local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
    local majority = bxor(band(a, b), band(a, c), band(b, c))
    h, g, f, e = g, f, e, tobit(d + t1)
    d, c, b, a = c, b, a, tobit(t1 + s0 + majority)
  end
  local parts = { a, b, c, d, e, f, g, h }
  for i = 1, 8 do
    state[i] = tobit(state[i] + parts[i])
  end
end

local function sha256(text)
  local bits = #text * 8
  local tail = "\128" .. string.rep("\0", (55 - #text) % 64)
  local length = string.char(0, 0, 0, 0, math.floor(bits / 2 ^ 24) % 256, math.floor(bits / 2 ^ 16) % 256, math.floor(bits / 256) % 256, bits % 256)
  local padded = text .. tail .. length
  local state = { unpack(START) }
  for at = 1, #padded, 64 do
    absorb(state, padded, at)
  end
  local words = {}
  for i = 1, 8 do
    words[i] = tohex(state[i])
  end
  return table.concat(words)
end

-- Known secrets of this worker, so that a caller's key is hashed once. Unknown ones are never kept.
local seen = {}

local function key_of(secret)
  if secret == nil or secret == "" or #secret > LONGEST then
    return nil
  end
  local key = seen[secret]
  if key == nil then
    key = KEYS[sha256(secret)]
    seen[secret] = key
  end
  return key
end

local function bearer(header)
  if header == nil then
    return nil
  end
  local scheme, secret = header:match("^(%a+) +(%S+)%s*$")
  if scheme ~= nil and scheme:lower() == "bearer" then
    return secret
  end
  return nil
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if HEADER == "" then
    if key_of(headers:get("repertory-peer-key")) ~= nil then
      headers:replace("x-repertory-peer", "1")
    end
    return
  end
  local model = headers:get(HEADER)
  if model == nil then
    return
  end
  local key = key_of(bearer(headers:get("authorization"))) or key_of(headers:get("x-api-key"))
  if key == nil then
    return
  end
  for _, pattern in ipairs(key.models) do
    if model:find(pattern) then
      headers:remove("authorization")
      headers:remove("x-api-key")
      headers:replace("x-repertory-caller", key.name)
      return
    end
  end
end
