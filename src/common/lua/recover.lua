#!lua flags=allow-oom
-- Take over what nobody renewed for a lease: of dead or frozen consumers, and what stands in my own name because the reply that
-- delivered it was lost; not what I am working on.
-- KEYS 1 stream   ARGV 1 group 2 consumer 3 lease in ms 4 most mails, then the stream ids I have in flight
-- -> {stream id, delivery count, fields}...
local busy = {}
for i = 5, #ARGV do busy[ARGV[i]] = true end
local most, ids = tonumber(ARGV[4]), {}
for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', most + #ARGV - 4)) do
  if not busy[entry[1]] and #ids < most then ids[#ids + 1] = entry[1] end
end
local taken = {}
if #ids == 0 then return taken end
for _, entry in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(ids))) do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)[1]
  taken[#taken + 1] = {entry[1], tostring(pending[4]), entry[2]}
end
return taken
