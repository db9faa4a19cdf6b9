-- Publishes a piece of a reply to whoever watches, and keeps the reply so far for who joins: it is no event and in no stream.
-- payload = {call, offset, text, …}; offset = characters before the piece. Returns OK | FENCED
--#include run
local run = live(run_id, fence)
if not run then return 'FENCED' end

local KEPT_BYTES = 65536 -- the beginning of a longer reply is kept; the rest is shown to those who watch, and stored by its commit
local KEPT_MS = 60000 -- a reply that says nothing for so long is told whole by its commit, or by its next attempt

local piece, key = cjson.decode(payload), k.reply(run_id)
local attempt, call, chars, text = unpack(redis.call('HMGET', key, 'attempt', 'call', 'chars', 'text'))
if piece.offset == 0 then
  attempt, call, chars, text = digits(run.attempt), piece.call, '0', ''
end
if attempt == digits(run.attempt) and call == piece.call then
  if tonumber(chars) == piece.offset and #text + #piece.text <= KEPT_BYTES then
    local _, more = string.gsub(piece.text, '[^\128-\191]', '') -- every byte but those that go on with a character
    redis.call('HSET', key, 'attempt', attempt, 'call', call, 'chars', digits(piece.offset + more), 'text', text .. piece.text,
      'at', iso(NOW_MS))
  end
  redis.call('PEXPIRE', key, KEPT_MS)
end

redis.call('PUBLISH', k.channel(run.agent, run.session, run_id), envelope('llm.delta', 'null', envelope_middle(run), payload))
return 'OK'
