#!lua flags=allow-oom
-- Set one counter of `open` to what it ought to be. An entry never changes: the caller has read them all up to two ids and names those
-- of this field; what came later is read here, and the index says which of them all is a mail's place now.
-- KEYS 1 stream 2 index 3 dlq 4 open
-- ARGV 1 field 2 last entry the caller read 3 last letter it read 4 most later ones to read, then n x {email_id, location}
-- -> {OK, count before, count now} | {BUSY}: too much came since
local count, MOST = 0, tonumber(ARGV[4])
local function is_there(email_id, location)
  if redis.call('HGET', KEYS[2], email_id) == location then count = count + 1 end
end
for i = 5, #ARGV, 2 do is_there(ARGV[i], ARGV[i + 1]) end
for kind, part in pairs({S = {KEYS[1], ARGV[2]}, D = {KEYS[3], ARGV[3]}}) do
  local later = redis.call('XRANGE', part[1], '(' .. part[2], '+', 'COUNT', MOST + 1)
  if #later > MOST then return {'BUSY'} end
  for _, entry in ipairs(later) do
    local mail = {}
    for i = 1, #entry[2], 2 do mail[entry[2][i]] = entry[2][i + 1] end
    local day = string.gsub(string.sub(mail.internal_date or '', 1, 10), '-', '')
    local field = (mail.account or '') .. '|' .. (mail.mailbox or '') .. '|' .. (day == '' and 'undated' or day)
    if mail.email_id and field == ARGV[1] then is_there(mail.email_id, kind .. ':' .. entry[1]) end
  end
end
local before = redis.call('HGET', KEYS[4], ARGV[1]) or '0'
if count > 0 then
  redis.call('HSET', KEYS[4], ARGV[1], count)
else
  redis.call('HDEL', KEYS[4], ARGV[1])
end
return {'OK', before, tostring(count)}
